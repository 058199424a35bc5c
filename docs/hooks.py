"""Files that lie elsewhere in the repository and are read in the documentation, too: results and notebooks."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"benchmarks": (".md", ".svg"), "notebooks": (".ipynb",)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them as if they lay beside the pages."""
    for folder, suffixes in ELSEWHERE.items():
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix in suffixes:
                name = f"{folder}/{path.name}"
                made = File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to them as the repository has them, from `docs/pages/`, lead there."""
    for folder in ELSEWHERE:
        markdown = markdown.replace(f"](../../{folder}/", f"]({folder}/")
    return markdown
