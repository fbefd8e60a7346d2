"""For all tests: none touches the checkout's data or figures, opens a window, or asks the network for weights."""

import atexit
import os
import shutil
import signal
import tempfile

import pytest
import torch

# Before thesis_lib.paths is imported for the first time.
_folder = tempfile.mkdtemp(prefix="thesis_lib-tests-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ["THESIS_DATA"] = os.path.join(_folder, "data")
os.environ["THESIS_FIGURES"] = os.path.join(_folder, "figures")
os.environ["MPLBACKEND"] = "agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("THESIS_RUN", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored, and so its children


def pytest_collection_modifyitems(items):
    """Put the longest test first: beside it, other processes run the rest."""
    items.sort(key=lambda item: item.path.stem != "test_thesis_profile")


@pytest.fixture
def two_threads():
    """Let torch compute on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
