"""Sphinx's settings for the site that `make docs` builds."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import gradclip

sys.path.append(str(Path(__file__).parent / "_ext"))

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Triton before TensorFlow: each brings an LLVM, and the other way round the process aborts.
for _framework in ("triton", "torch", "tensorflow", "keras", "optax", "lightning", "transformers"):
    importlib.import_module(_framework)

project = "gradclip"
author = project_copyright = "gradclip contributors"
version = release = gradclip.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "commands",
]
exclude_patterns = ["_build"]
nitpicky = True

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

# The words of docstrings say what an argument may be; a name in single backquotes is a reference.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
default_role = "py:obj"
highlight_language = "none"
smartquotes = False  # which would make one dash of the two before an option
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False

copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_title = "gradclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
