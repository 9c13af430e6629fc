"""What is shown of records: tables, plots, reports, and a verdict in one sentence."""
