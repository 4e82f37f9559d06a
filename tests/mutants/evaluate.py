"""Bugs in evaluation: manifests, resuming, sharing, identity, scores of a sample, tables."""

from tests.mutants import Mutant

TESTS = ["tests/evaluate", "tests/test_fuzz.py"]
PLACE = "i2am/evaluate/"
MANIFEST, SOURCES, STORE, JOURNAL = (
    f"{PLACE}manifest.py",
    f"{PLACE}sources.py",
    f"{PLACE}store.py",
    f"{PLACE}journal.py",
)
LEASES, IDENTITY, RUN, SCORES = f"{PLACE}leases.py", f"{PLACE}identity.py", f"{PLACE}run.py", f"{PLACE}scores.py"
SUMMARY, CONTACT, PARQUET, THUMBNAILS = (f"{PLACE}{n}.py" for n in ("summary", "contact", "parquet", "thumbnails"))
COMPARE, TRACKERS = f"{PLACE}compare.py", f"{PLACE}trackers.py"
OF_MANIFESTS = ["tests/evaluate/test_manifest.py"]
OF_FOLDERS = ["tests/evaluate/test_sharing.py", "tests/evaluate/test_evaluate.py"]
OF_TABLES = ["tests/evaluate/test_summary.py", "tests/evaluate/test_evaluate.py"]
TESTS_OF = {
    MANIFEST: OF_MANIFESTS,
    SOURCES: OF_MANIFESTS,
    **dict.fromkeys((STORE, JOURNAL, LEASES, IDENTITY, RUN), OF_FOLDERS),
    **dict.fromkeys((SUMMARY, CONTACT, PARQUET), OF_TABLES),
    SCORES: ["tests/evaluate/test_evaluate.py"],
    COMPARE: ["tests/evaluate/test_compare.py"],
    THUMBNAILS: ["tests/evaluate/test_compare.py", "tests/evaluate/test_evaluate.py"],
    TRACKERS: ["tests/evaluate/test_trackers.py"],
}
MUTANTS = [
    Mutant(MANIFEST, 'f"{seed}:{name}"', 'f"{name}"', "--seed changes no sample's seed"),
    Mutant(MANIFEST, "ROW.encode([named, own])", "ROW.encode(named)", "another --seed counts as the same row"),
    Mutant(MANIFEST, "divmod(range(len(self))[place], self.BLOCK)", "divmod(place, self.BLOCK)", "no negative places"),
    Mutant(MANIFEST, "if self._open[0] != block:", "if self._open[0] < block:", "going back in the manifest"),
    Mutant(MANIFEST, "        if len(self._newest) == self.BLOCK:", "        if len(self._newest) > self.BLOCK:"),
    Mutant(MANIFEST, "row-{place % len(self) + 1:05d}", "row-{place + 1:05d}", "the last one asked for as -1"),
    Mutant(MANIFEST, "box.top >= box.bottom or box.left >= box.right", "box.top >= box.bottom"),
    Mutant(MANIFEST, "if len(name.encode()) > LONGEST_ID:", "if len(name) > LONGEST_ID:", "letters, not bytes"),
    Mutant(
        SOURCES, "if name != key and cells:", "if name != key and key:", "a folder's first file yields an empty sample"
    ),
    Mutant(SOURCES, "[place].as_py()\n", "[group].as_py()\n", "the picture of another row"),
    Mutant(
        SOURCES,
        "functools.partial(_read_member, member.offset_data, member.size)",
        "functools.partial(_read_member, member.offset, member.size)",
    ),
    Mutant(
        STORE,
        "or (not entry.ok and entry.file not in others)",
        "or not entry.ok",
        "tries again what another has just tried",
    ),
    Mutant(STORE, "entry.digest != sample.digest or (not", "(not", "an edited row keeps its old scores"),
    Mutant(STORE, "stamps_now(sample.files) == entry.stamps != 0", "stamps_now(sample.files) == entry.stamps"),
    Mutant(
        STORE,
        "entry != self._to_retry.get(sample.id)",
        "sample.id not in self._to_retry",
        "a second success is done again",
    ),
    Mutant(STORE, "if k not in NOT_COMPARED}", "}", "other versions are another experiment"),
    Mutant(
        JOURNAL,
        "return not other.ok and (self.ok or self.finished >= other.finished)",
        "return self.finished >= other.finished",
    ),
    Mutant(JOURNAL, "                os.ftruncate(self._handle, self._size)\n", "", "half a line stays"),
    Mutant(JOURNAL, 'if not line.endswith(b"\\n"):', "if not line:", "half a record is skipped for good"),
    Mutant(
        LEASES,
        "for generation in range(self._held.pop(sample, -1), -1, -1):",
        "for generation in [self._held.pop(sample, 0)]:",
    ),
    Mutant(LEASES, "if owner.machine == machine() else self._age(path) < PATIENCE", "or self._age(path) < PATIENCE"),
    Mutant(IDENTITY, "if status.st_size <= SMALL:", "if status.st_size < 0:", "a touched config is other weights"),
    Mutant(IDENTITY, "if now[2] != was[2]:", "if now[0] != was[0]:", "a picture of the same size"),
    Mutant(RUN, "while left and (wait or rounds < 2):", "while left and (wait or rounds < 1):"),
    Mutant(RUN, "elif not store.attempted(sample):", "else:", "waits for what is done"),
    Mutant(
        RUN,
        "score(r2g, g2r, traced.mask, traced.reference_mask, sample.box)",
        "score(r2g, g2r, traced.mask, traced.mask, sample.box)",
    ),
    Mutant(SCORES, "size=None if mask is None else tuple(mask.shape)", "size=None", "boxes compared in map cells"),
    Mutant(SCORES, "box_of(mask) if box is None else box", "box_of(mask)", "the box column is not read"),
    Mutant(
        SUMMARY, '        if record["status"] != "ok":\n            if len', "        if False:\n            if len"
    ),
    Mutant(
        SUMMARY,
        "(value, -self.count, record)), (self.worst, (-value",
        "(value, -self.count, record)), (self.worst, (value",
    ),
    Mutant(
        SUMMARY,
        "half = 1.959963985 * sd / math.sqrt(len(x))",
        "half = 1.959963985 * sd",
        "of one sample, not of the mean",
    ),
    Mutant(SUMMARY, "sd = float(x.std(ddof=1))", "sd = float(x.std())"),
    Mutant(SUMMARY, '"missing": samples - self.status.total()', '"missing": samples - self.status["ok"]'),
    Mutant(SUMMARY, '| {"seed": "int64"}', '| {"seed": "float64"}', "large seeds are rounded"),
    Mutant(PARQUET, "strings_can_be_null=True", "strings_can_be_null=False", "no error is an empty text"),
    Mutant(PARQUET, "newlines_in_values=True", "newlines_in_values=False"),
    Mutant(CONTACT, "max(round(s.height * min(1, width / s.width)), 1)", "s.height", "wide strips lose their shape"),
    Mutant(CONTACT, "    except OSError:\n        empty", "    except FileNotFoundError:\n        empty"),
    Mutant(THUMBNAILS, "x / x.mean((-2, -1), keepdim=True)", "x / x.mean()", "a scale for all maps"),
    Mutant(THUMBNAILS, "size = [max(round(n * side / longer), 1)", "size = [max(round(side), 1)", "square thumbnails"),
]
