"""How many examples the tests of properties take: ``--hypothesis-profile thorough`` for many."""

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:
    pass  # the tests that need it say so
else:
    common = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings.register_profile("quick", max_examples=12, derandomize=True, **common)
    settings.register_profile("thorough", max_examples=200, print_blob=True, **common)
    settings.load_profile("quick")
