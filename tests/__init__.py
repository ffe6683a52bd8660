"""A package of its own, so that those of the same name which some distributions install do not take its place."""
