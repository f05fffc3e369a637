"""The bundled domain: captioned scenes of coloured shapes, a gold judge, raters, and a small pipeline."""
