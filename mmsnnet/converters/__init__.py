import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.converters.snnet import convert_snnet
from mmsnnet.converters.snnetv2 import convert_snnetv2

__all__ = ["convert_snnet", "convert_snnetv2"]
