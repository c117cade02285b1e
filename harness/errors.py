"""How a run can fail, apart from its engine's InputError. Imports nothing, so that the command line starts quickly."""


class RunFailed(RuntimeError):
    """The run has no valid measurements; the message is one sentence that says why. Its folder says more."""
