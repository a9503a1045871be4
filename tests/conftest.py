"""For all tests. Examples have no deadline: a loaded machine is slow, not wrong."""

from hypothesis import settings

settings.register_profile("tdmld", deadline=None)
settings.load_profile("tdmld")
