"""Settings shared by the optimizer's tests."""

import hypothesis

# Times on a shared machine say nothing, and a test that fails must fail for everyone.
hypothesis.settings.register_profile("optimizer", deadline=None, derandomize=True)
hypothesis.settings.load_profile("optimizer")
