"""Stands in for the pages that a command writes, in a checkout where it has not run: links to them stay links."""

from mkdocs.structure.files import File

GENERATED = {
    "evidence.md": "# Evidence\n\n`python -m benchmarks.evidence` writes this page.",
    "refinement.md": "# Refinement\n\n## Guidance by the gradient\n\n`python -m benchmarks.refinement` writes this.",
    "benchmarks.md": "# Benchmarks\n\n`make bench` writes this page.",
}


def on_files(files, config, **_):
    for name, text in GENERATED.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=text))
    return files
