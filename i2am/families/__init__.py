"""Where the reference enters attention, one file a model family.

A family is read from a pipeline or a bare model once, when tracing starts; from then on it answers, for each forward
and each attention module, which tokens are generated, which encode the reference, and on which grids. All that is known
of a family stands in its file; a new file is found by itself (:mod:`i2am.families.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from i2am.references import Banked, Concatenated, Grid, KeySet, Reference

if TYPE_CHECKING:
    from i2am.tracing.guidance import Told
    from i2am.tracing.intercept import AttentionCall, LayerContext

SELF_HINT = 'mode="self" gives maps of spatial self-attention instead, which are named "self"'
CHANNELS = "the image enters as channels beside the latents, so that every token mixes both"
RESIDUAL = "the control image enters as residuals of a ControlNet"
START = "the image is only what denoising starts from"

Described = list[Reference] | Concatenated | Banked | None  # what a caller says about the reference
Hooked = tuple[nn.Module, Callable[..., Any], str]  # (module, function, "before" or "after" its forward)


class ForwardInputs(NamedTuple):
    """Arguments of one forward of the traced model, as a family reads them."""

    latents: Tensor  # [B, C, …] what is denoised, without channels concatenated from elsewhere
    timestep: Tensor | float  # in the scheduler's units
    grid: Grid | None = None  # of the latents, where their shape does not tell (tokens)
    frames: int = 1  # of a video: attention sees each as an image of the batch
    strip: int = 1  # frames of a video below each other in ``grid``: attention sees all at once
    lead: int = 0  # frames of the same video that are given, and come before those of the strip
    conditioning: tuple[Tensor, ...] = ()  # [B, …] embeddings that carry the reference
    stepped: bool = True  # the scheduler steps latents of this size (not of several pictures side by side)
    aside: str | None = None  # why this forward is no evaluation of a run: it does not count


class TokenLayout(NamedTuple):
    """Layout of a reference-carrying attention call: generated queries on their grid, references among its keys."""

    grid: Grid
    references: tuple[Reference, ...]
    queries: slice | Tensor = slice(None)
    rollout: tuple[Tensor | None, ...] | None = None  # per reference [B, K, X]: from its keys to what they were made of
    keys: int | None = None  # how many the call has; None: any number that the references fit
    weights: tuple[Tensor | None, ...] | None = None  # per reference [1, Q]: an adapter's scale, and mask at each query
    sets: tuple[KeySet, ...] = ()  # other keys that are told apart; they may overlap
    parts: tuple[int, ...] | None = None  # stretches of the sequence that context parallelism splits one by one
    whole_keys: bool = False  # which are no part of that sequence: every process has all of them


class KeySets(NamedTuple):
    """Key sets that are told apart beside the references."""

    words: Mapping[str, Sequence[int]] = {}  # name → tokens, counted from the first text token, or back from the last
    text: bool = False
    itself: bool = False
    found: bool = False  # the words were found in the prompt: a call on another one (negative) may lack their places

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the options that ask for something."""
        return tuple(name for name in ("words", "text", "itself") if getattr(self, name))


class TextPart(NamedTuple):
    """Tokens that one tokenizer of a pipeline makes of its prompt."""

    tokenizer: str  # attribute of the pipeline
    prompts: tuple[str, ...] = ("prompt",)  # arguments of its call; the first one that is given is read
    length: str | None = None  # argument that says how many tokens; None: tokenizer.model_max_length
    same: tuple[str, ...] = ()  # arguments that must hold the same prompt: their tokens share channels with these
    chat: Callable[[Any], tuple[str, str]] | None = None  # what a pipeline puts before and behind the prompt
    from_end: bool = False  # pictures among what stands before it make more tokens: words are counted from the last one


class View(NamedTuple):
    """The part of a picture that one call of a model sees, in latent pixels."""

    place: tuple[int, int]  # (top, left)
    canvas: Grid  # the whole picture


class PipelineFacts(NamedTuple):
    """Facts on pipelines whose class, or one that it is made from, fits a glob pattern.

    A pattern with neither ``refused`` nor ``adapter`` says that the reference becomes keys in every call.
    """

    pattern: str
    argument: str = "image"  # of the pipeline's call, which takes the reference
    several: bool = False  # it takes a list of references
    adapter: bool = False  # only through an adapter
    refused: str | None = None  # why no attention keys encode a reference
    keys: str | None = None  # weights of an attention module; models that have them do have such keys
    described: Described | Callable[[Any], Described] = None  # where it is, or how a pipeline says; else somebody must
    model: str | None = None  # attribute with the denoiser, where it is neither unet nor transformer
    scheduler: str = "scheduler"  # attribute with that denoiser's
    told: Callable[[Any], Told] | None = None  # how the running call lays out guidance; None: as most pipelines do
    views: Callable[[dict[str, Any]], View] | None = None  # local variables of its call → where it looks; None: whole
    by_timestep: bool = False  # a step is a timestep that comes: its call steps copies of the scheduler, or more often
    timestep: Callable[[float], float] | None = None  # the scheduler's → what the model is given; None: the same


class Request(NamedTuple):
    """Request of how a model is to be read."""

    references: Described = None
    self_attention: bool = False  # mode="self"
    rollout: bool = False
    image_only: bool = False  # a pipeline says that the context is the reference image and nothing else
    image_grid: Grid | None = None  # of the pipeline's image encoder
    sets: tuple[str, ...] = ()  # key sets beside the references: "words", "text", "itself"


class Family:
    """A model family, as a tracer asks it. Subclasses say what differs."""

    models: ClassVar[tuple[str, ...]] = ()  # class names of the models that are this family's, whatever the request
    pipelines: ClassVar[tuple[PipelineFacts, ...]] = ()
    conditional_call: ClassVar[int | None] = None  # diffusers' pipelines run guidance as calls: which is conditional
    batched_guidance: ClassVar[bool] = True  # guidance is part of the batch, as the pipeline says
    latent_pixels: ClassVar[int] = 1  # of the latent image per side of what ForwardInputs calls its grid
    why_not_itself: ClassVar[str] = ""  # why the picture's own tokens are not among the keys that are looked at
    texts: ClassVar[tuple[TextPart, ...]] = ()  # how diffusers' pipelines make the text tokens, in their order
    key_sets: KeySets = KeySets()  # what is asked for in the running forward
    told_by_keys: ClassVar[bool] = False  # which half is unconditional shows in the reference keys alone

    @classmethod
    def read(cls, model: nn.Module, request: Request) -> Family:
        """Return the family of a model of :attr:`models`.

        Raises:
            ValueError: the request does not fit, or nothing tells where the reference is; says what to write.
        """
        raise NotImplementedError

    def known_sets(self) -> tuple[str, ...]:
        """Return the key sets beside the references that are told apart: among "words", "text" and "itself"."""
        return ()

    def has_adapters(self) -> bool:
        """Return whether an adapter gives the model keys of a reference, whatever the pipeline."""
        return False

    def layers(self) -> dict[str, nn.Module]:
        """Return the attention modules that may carry the reference, by name."""
        raise NotImplementedError

    def by_default(self, layer: str) -> bool:
        """Return whether a layer is in the default set of the maps (the paper leaves the mid block out)."""
        return True

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardInputs:
        """Read one forward's arguments. Raises ValueError when the layout does not fit; nothing has run then."""
        raise NotImplementedError

    def enter(self, layer: LayerContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set ``layer.awaits`` when the module that starts has an attention call that carries the reference."""

    def leave(self, layer: LayerContext, module: nn.Module) -> AttentionCall | None:
        """Return the attention (``value=None``) that a reference-carrying module computed by itself, when it ends and
        no call of it was intercepted; None where nobody can tell: then the layer was blind.
        """
        return None

    def watch(self) -> Iterable[Hooked]:
        """Return hooks of the family's own, for as long as tracing lasts."""
        return ()


OURS = ("i2am ", "diffusers' own ")  # how a reason begins that is a limit of the code, and no trait of the model
UNKNOWN = "i2am does not know"


def no_reference_keys(name: str, reason: str) -> str:
    """Return the message for a pipeline or model without reference keys, or of which that is not known."""
    if reason.startswith(OURS):
        return f"{name}: {reason}. {SELF_HINT}"
    return (
        f"{name}: no attention keys encode a reference ({reason}). Attention then tells which positions exchange "
        f"information, never reference from generation. {SELF_HINT}"
    )
