"""Stage two: prompt tuning of a frozen vision-language backbone against a sealed knowledge cache."""

from cache.torchvision_schemas import install

DISTRIBUTION = "vademecum"
install()
