"""Which NLL a trainer minimises: that of a head, the model's own, or a loss of somebody's own."""
