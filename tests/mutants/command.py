"""Bugs in the command: options, exit codes, streams, what a run leaves behind, processes."""

from tests.mutants import Mutant

TESTS = ["tests/cli"]
PLACE = "i2am/cli/"
ARGUMENTS, INIT, STREAMS, RESULTS = (
    f"{PLACE}arguments.py",
    f"{PLACE}__init__.py",
    f"{PLACE}streams.py",
    f"{PLACE}results.py",
)
JOB, PIPELINES, IMAGES, TRACE = f"{PLACE}job.py", f"{PLACE}pipelines.py", f"{PLACE}images.py", f"{PLACE}trace.py"
EVALUATE, PROCESSES, WEIGHTS = f"{PLACE}evaluate.py", f"{PLACE}processes.py", f"{PLACE}weights.py"
OF_EVALUATE = ["tests/evaluate/test_options.py", "tests/evaluate/test_evaluate.py"]
TESTS_OF = {
    PROCESSES: ["tests/evaluate/test_sharing.py"],
    EVALUATE: OF_EVALUATE,
    WEIGHTS: OF_EVALUATE,
    STREAMS: ["tests/cli/test_ends.py"],
    ARGUMENTS: ["tests/cli/test_ends.py", "tests/cli/test_cli.py"],
}
MUTANTS = [
    Mutant(ARGUMENTS, "int(text) >= 2**63", "int(text) >= 2**64", "a seed that torch refuses"),
    Mutant(ARGUMENTS, "    if not math.isfinite(value):", "    if math.isnan(value):", "inf is a number"),
    Mutant(ARGUMENTS, "n > 0 and n % 8 == 0", "n % 8 == 0", "0x0"),
    Mutant(ARGUMENTS, 'help": help, "type": type, **kwargs}', 'help": help, **kwargs}', "options stay texts"),
    Mutant(INIT, "return code or STOPPED", "return code", "a full device ends with 0"),
    Mutant(
        INIT,
        "        return _ended(SOME_FAILED, str(error), debug)",
        "        return _ended(INTERNAL, str(error), debug)",
    ),
    Mutant(
        INIT, "    if debug:\n        complain", "    if not debug:\n        complain", "tracebacks without --debug"
    ),
    Mutant(INIT, "    except BrokenPipeError:", "    except ConnectionError:"),
    Mutant(STREAMS, "if getattr(sys, name) is None:", "if False:", "a stream closed before the start ends the run"),
    Mutant(STREAMS, "if handler == signal.SIG_DFL]", "]", "nohup does not help"),
    Mutant(STREAMS, "            signal.raise_signal(came[0])", "            pass", "Ctrl-C at the end is lost"),
    Mutant(STREAMS, "if not isinstance(error, BrokenPipeError):", "if isinstance(error, BrokenPipeError):"),
    Mutant(STREAMS, 'errors="backslashreplace"', 'errors="strict"', "names that the terminal cannot show end the run"),
    Mutant(RESULTS, "key=lambda n: n == SETTINGS)", "key=lambda n: n != SETTINGS)", "settings first"),
    Mutant(
        RESULTS,
        "            (out / name).unlink(missing_ok=True)\n",
        "            pass\n",
        "figures of an earlier run stay",
    ),
    Mutant(
        RESULTS,
        'directions = {"r2g": generated, "g2r": reference}',
        'directions = {"r2g": reference, "g2r": generated}',
        "each on the other's picture",
    ),
    Mutant(
        RESULTS,
        'yield f"ulam_{direction}", partial(unified, direction, image)',
        'yield f"ulam_{direction}", partial(unified, "r2g", image)',
        "ulam_g2r.png shows R2G",
    ),
    Mutant(
        RESULTS, 'yield f"tlam_{direction}", partial(draw, "time")', 'yield f"tlam_{direction}", partial(draw, "layer")'
    ),
    Mutant(
        RESULTS, 'partial(draw, "head", layers=layers)', 'partial(draw, "head")', "heads of layers that share no count"
    ),
    Mutant(
        RESULTS, "place = out / FAILED if written_before(out) else out", "place = out", "NaN replaces the earlier run"
    ),
    Mutant(RESULTS, "first, last = sum(counts[:group]) + 1", "first, last = sum(counts[:group])", "the step before"),
    Mutant(RESULTS, "and p.name not in own)", ")", "a second run is refused"),
    Mutant(JOB, '"float32" if device.type == "cpu" else "float16"', '"float32"', "half as fast on a GPU"),
    Mutant(JOB, "torch.Generator().manual_seed(seed)", "torch.Generator().manual_seed(0)", "--seed does nothing"),
    Mutant(
        JOB,
        "values = {**vars(args), **(texts or {}), **images}",
        "values = {**(texts or {}), **vars(args), **images}",
        "the manifest's prompt is not read",
    ),
    Mutant(
        JOB,
        "part_seen(mask.resize(reference.size), self.pipe, generated)",
        "part_seen(mask, self.pipe, generated)",
        "a mask of another size is cut elsewhere",
    ),
    Mutant(
        JOB, "time_groups=args.time_groups, layers=args.layers", "time_groups=args.time_groups", "--layers does nothing"
    ),
    Mutant(IMAGES, "(picture.width - width) // 2", "0", "cut out on the left"),
    Mutant(
        IMAGES, 'Resampling.NEAREST if option == "mask" else Resampling.LANCZOS', "Resampling.LANCZOS", "soft masks"
    ),
    Mutant(
        IMAGES,
        "max(height // 8, 1) * 8, max(width // 8, 1) * 8",
        "max(width // 8, 1) * 8, max(height // 8, 1) * 8",
        "portrait becomes landscape",
    ),
    Mutant(
        PIPELINES,
        "1.0 if args.ip_adapter_scale is None else args.ip_adapter_scale",
        "1.0",
        "--ip-adapter-scale does nothing",
    ),
    Mutant(PIPELINES, "        if len(weights) != 1:", "        if not weights:", "the first of several weight files"),
    Mutant(PIPELINES, "torch_dtype=dtype, **given, **parts)", "torch_dtype=dtype, **parts)", "--variant does nothing"),
    Mutant(
        TRACE,
        "args.reference, args.more_references = first, more or None",
        "args.reference, args.more_references = first, None",
        "only the first reference",
    ),
    Mutant(TRACE, '"record_every": args.record_every, ', "", "--record-every does nothing"),
    Mutant(
        EVALUATE,
        "mask = np.asarray(mask.resize(generated.size, 0), dtype=np.float32) / 255",
        "mask = np.asarray(mask, dtype=np.float32) / 255",
        "a mask of the input's size",
    ),
    Mutant(EVALUATE, 'return SOME_FAILED if summary["failed"] else 0', "return 0"),
    Mutant(EVALUATE, 'unneeded=("mask",)', "unneeded=()", "a mask that only scores is refused"),
    Mutant(
        EVALUATE,
        'job.as_seen(reference_mask, images["reference"], generated)',
        "reference_mask",
        "not cut as the encoder cuts",
    ),
    Mutant(
        EVALUATE,
        "while (now := store.refresh()) > seen:",
        "while (now := store.refresh()) > seen and seen < 0:",
        "others' last samples are missing",
    ),
    Mutant(
        PROCESSES,
        "places[(self.index + k) % self.count :: self.count]",
        "places[self.index :: self.count]",
        "shares are done twice, others never",
    ),
    Mutant(
        PROCESSES,
        "return not self.launch or self.index == 0",
        "return self.index == 0",
        "an array's other tasks say nothing",
    ),
    Mutant(PROCESSES, '_number(f"{array}STEP", 1)', "1"),
    Mutant(
        WEIGHTS,
        'Path(args.ip_adapter, args.ip_adapter_subfolder or "", args.ip_adapter_weight)',
        "Path(args.ip_adapter, args.ip_adapter_weight)",
    ),
]
