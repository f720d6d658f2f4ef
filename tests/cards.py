"""The section ``card`` of reward configs that tests write themselves."""

PROVENANCE = dict(
    origin="written by a test",
    annotators="no people: a rule",
    aggregation="one verdict",
    licence="Apache-2.0",
)


def card(*labels):
    """Everything that must be said, for sources of these labels."""
    return dict(
        sources={label: dict(PROVENANCE) for label in labels},
        licence="Apache-2.0",
        limits=("It knows sums of one digit.",),
    )
