"""A sweep is one object: what is varied, the trials that this makes, the processes that run them, and one answer."""

GROUP = "sweep"


def asked_for(flags: list[str], overrides: list[str]) -> bool:
    """Whether a command line is a sweep: with -m, or with a preset, or a key of one."""
    return bool({"-m", "--multirun"} & {*flags} or any(map(of_sweep, overrides)))


def of_sweep(override: str) -> bool:
    key = override.partition("=")[0].lstrip("+~")
    return key == GROUP or key.startswith(f"{GROUP}.")
