"""Sphinx's settings for the documentation site: `sphinx-build -W docs site`, with the extra [docs]."""

import patchcore_jax

project = 'patchcore_jax'
author = 'The patchcore_jax authors'
version = release = patchcore_jax.__version__
html_theme = 'furo'
html_title = 'patchcore_jax'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['results/table_*.md']
default_role = 'code'

# Headings are linked to as GitHub does it, so that the same Markdown is right in both places.
myst_heading_anchors = 4
myst_enable_extensions = ['colon_fence']
suppress_warnings = ['myst.xref_missing']  # files outside of docs/, which tests/readme_test.py looks for

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
napoleon_numpy_docstring = False
napoleon_use_ivar = True



def setup(app):
  """Has docstrings read as the plain text that they are: * and | mean nothing in it."""

  def plain(app, what, name, obj, options, lines):
    lines[:] = [line if line.lstrip().startswith(('>>>', '...')) else
                line.replace('\\', '\\\\').replace('*', r'\*').replace('|', r'\|') for line in lines]

  app.connect('autodoc-process-docstring', plain, priority=1)  # before napoleon writes reStructuredText
