import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
