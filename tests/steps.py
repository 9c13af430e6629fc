"""A step of R-Drop as its two halves in a row, as trainers and `rdrop_step` have them."""

from regdrop.step_passes import compute_passes_loss, run_step_passes


def compute_step_loss(forward, batch, target, terms, config, plan, **options):
    """Run the passes that a step plans and compute their loss."""
    passes = run_step_passes(forward, batch, target, config, plan)
    return compute_passes_loss(passes, target, terms, config, plan, **options)
