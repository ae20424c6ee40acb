"""What looks at a data set or at a file's header needs no torch."""

import subprocess
import sys

from tests.arch import tree

TORCH_FREE = [
    "library.data.assemble",
    "library.data.captions",
    "library.data.companions",
    "library.data.records",
    "library.data.report",
    "library.data.sources.folders",
    "library.data.sources.metadata_json",
    "library.data.table",
    "library.data.transforms",
    "library.data.validation",
    "library.data.inspection",
    "library.data.report_page",
    "library.diffusion.crops",
    "library.inference.dataset_report",
    "library.io.lora_settings",
    "library.io.metadata_report",
    "library.models.token_ids",
]


CODE = """
import importlib, sys, traceback
sys.modules["torch"] = None
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        print(name, traceback.format_exc(), sep="\\n")
"""


def test_the_description_of_data_sets_and_headers_is_made_without_torch():
    command = [sys.executable, "-c", CODE, *TORCH_FREE]
    result = subprocess.run(command, cwd=tree.ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == ""
