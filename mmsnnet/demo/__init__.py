"""A page in the browser that shows what a stitched model does: ``python -m mmsnnet.demo FOLDER`` (extra: demo)."""
