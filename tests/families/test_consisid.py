"""ConsisID: the video's tokens look at those of a face, in a softmax written out."""

import pytest
import torch

import i2am
from tests import support_table as support
from tests.helpers.tiny_models import videos
from tests.helpers.truth import Captured, Truth

FRAMES, FACE = 2, 4


def projected(model, go):
    """Run ``go()``; return the queries and keys of every call of the face's attention."""
    calls, handles, state = [], [], {"evaluation": -1}
    handles.append(model.register_forward_pre_hook(lambda *_: state.update(evaluation=state["evaluation"] + 1)))
    for name, module in model.named_modules():
        if name.startswith("perceiver_cross_attention.") and name.count(".") == 1:

            def after_kv(module, args, kv, name=name, heads=module.heads):
                q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (state["q"], kv.chunk(2, -1)[0]))
                k = k.expand(len(q), -1, -1, -1)
                calls.append(Captured(state["evaluation"], name, 0, (FRAMES * 2, 3), q, k, None))

            handles.append(module.to_q.register_forward_hook(lambda m, a, q: state.update(q=q)))
            handles.append(module.to_kv.register_forward_hook(after_kv))
    go()
    for handle in handles:
        handle.remove()
    return calls


def denoising(model, faces):
    x, first = videos.noise(1, FRAMES, 4, 4, 6), videos.noise(1, FRAMES, 4, 4, 6, seed=5)

    def call(t, text):
        video = torch.cat([x * t / 900, first], dim=2)
        return dict(
            hidden_states=video.repeat(2, 1, 1, 1, 1),
            encoder_hidden_states=torch.cat([text + 1, text]),
            timestep=torch.tensor([t, t]),
            id_cond=videos.noise(faces, 6, seed=6),
            id_vit_hidden=[videos.noise(faces, 3, 8, seed=i) for i in range(5)],
        )

    return videos.denoise(model, call, guided=False)


@pytest.mark.parametrize("faces", [1, 2])  # one for the whole batch, or one a sample
@support.family("ConsisID", "ConsisIDPipeline: its transformer, bare", "a face's tokens, in a softmax of their own")
def test_consisid(faces):
    model = videos.consisid()
    go = denoising(model, faces)
    calls, plain = projected(model, go), go()
    with i2am.patch_transformer(model, num_steps=4, time_groups=2, record="qk") as tracer:
        assert go().equal(plain)
    maps = tracer.maps()
    assert (maps.references, maps.frames, len(maps.layers)) == (["face"], FRAMES, 2)
    truth = Truth(calls, samples=slice(1, 2), groups=[0, 0, 1, 1])
    support.check(maps, truth, 2, directions=("r2g",))
    with pytest.raises(ValueError, match="no 2-D layout"):
        maps.ulam("g2r")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="face tokens of a ConsisIDTransformer3DModel are known"):
        i2am.patch_transformer(videos.consisid(), reference=i2am.Reference())
    with pytest.raises(ValueError, match="no attention keys encode a reference"):
        i2am.patch_transformer(videos.consisid(is_train_face=False))
