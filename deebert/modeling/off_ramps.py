"""The off-ramps of a model."""


def is_off_ramp(parameter_name: str) -> bool:
    """Whether a model's parameter of this name belongs to the off-ramps: a head or the learning-to-exit head."""
    return ".highway." in parameter_name or ".learn_to_exit." in parameter_name
