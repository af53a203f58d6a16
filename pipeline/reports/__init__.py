"""Reports as HTML pages that open without a network."""
