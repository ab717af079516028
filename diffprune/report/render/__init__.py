"""Tables and figures as HTML, Markdown, LaTeX, CSV, SVG and text for a terminal."""
