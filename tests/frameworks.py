"""The frameworks that integrations are tested with: where REQUIRE_FRAMEWORKS is set, as in CI, none may be missing."""

import importlib
import os

import pytest


def framework(name):
    """Return the module of this name, or skip the file that asks for it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported; everything here comes from the disk
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("REQUIRE_FRAMEWORKS"):
            pytest.fail(f"REQUIRE_FRAMEWORKS is set, and {name} cannot be imported: {error}", pytrace=False)
        pytest.skip(f"{name} cannot be imported: {error}", allow_module_level=True)
