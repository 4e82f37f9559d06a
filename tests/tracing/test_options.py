"""What may be asked of a tracer is written once: types and settings agree, and no entry repeats an option."""

import inspect
from dataclasses import fields

import pytest

import i2am
from i2am.tracing.options import KeywordOptions, ModuleOptions, TraceOptions, TraceSettings

BY_POSITION = {"time_groups", "layers"}
NOT_OF_MODULES = TraceOptions.__annotations__.keys() - ModuleOptions.__annotations__.keys()
SETTINGS = {f.name: f for f in fields(TraceSettings)}


def test_types_and_settings_agree():
    typed = {name: kind.__forward_arg__ for name, kind in TraceOptions.__annotations__.items()}
    assert typed == {name: f.type for name, f in SETTINGS.items()}
    assert set(KeywordOptions.__annotations__) == typed.keys() - BY_POSITION
    assert {"mode", "rollout", "output", "weighted"} <= NOT_OF_MODULES


@pytest.mark.parametrize("entry", [i2am.trace, i2am.patch_unet, i2am.patch_transformer, i2am.patch_modules])
def test_every_entry_lists_every_option(entry):
    without = NOT_OF_MODULES if entry is i2am.patch_modules else set()
    parameters = inspect.signature(entry).parameters
    for name in SETTINGS.keys() - without:
        assert parameters[name].default == SETTINGS[name].default
        assert f"\n    {name}: " in entry.__doc__
    for name in without:
        with pytest.raises(TypeError, match=rf"patch_modules\(\) takes no {name}="):
            entry(None, reference=i2am.Reference(), **{name: True})
    written = inspect.getsource(inspect.unwrap(entry))
    assert not [name for name in SETTINGS.keys() - BY_POSITION - NOT_OF_MODULES if f"    {name}:" in written]
