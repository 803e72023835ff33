"""Hatchling's hook for the page of a release: the README's links lead to the repository that publishes it.

In a checkout README.md has relative links. A release's workflow names its repository in GITHUB_REPOSITORY.
"""

import os
import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface

README = pathlib.Path(__file__).with_name("README.md")
PAGES = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}


class Published(MetadataHookInterface):
    """Sets the readme and, in a release's workflow, the addresses."""

    def update(self, metadata: dict) -> None:
        """Adds to the project's metadata."""
        text, repository = README.read_text(), os.environ.get("GITHUB_REPOSITORY")
        if repository:
            address = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}"
            tag = f"v{metadata['version']}"
            text = absolute(text, address, tag)
            pages = {name: f"{address}/blob/{tag}/{page}" for name, page in PAGES.items()}
            metadata["urls"] = {"Repository": address, "Issues": f"{address}/issues", **pages}
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, address: str, tag: str) -> str:
    """The text with its relative links and images at a tag of a repository."""
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:)", rf"\g<1>{address}/raw/{tag}/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!\w+:|#)", rf"\g<1>{address}/blob/{tag}/", text)
