"""The site: `make site` builds it, without a network, from these pages, the notebooks and the docstrings."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

import ftkit  # noqa: E402

project = "ftkit"
author = "The ftkit authors"
version = release = ftkit.__version__

extensions = [
    "myst_nb",  # Markdown and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",  # docstrings in Google style
    "lessons",
    "reference",
    "mathml",
]
exclude_patterns = ["extensions"]

# The notebooks are shown as they were committed.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # an output may have equations, as the text has
nb_ipywidgets_js = {}  # the outputs have no widgets, and these scripts would come from elsewhere
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_math_renderer = "mathml"  # browsers show it without a script
html_theme = "furo"
html_title = "ftkit"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_use_index = html_domain_indices = False  # the search finds the same
html_theme_options = {"navigation_with_keys": True}
pygments_style = "xcode"

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as one list
autodoc_member_order = "bysource"  # of a door: the order of its names
autodoc_typehints_format = "short"
autodoc_default_options = {"no-value": True, "exclude-members": "model_config"}  # of pydantic
autodoc_preserve_defaults = True
autosummary_generate = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
