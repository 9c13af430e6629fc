"""What is kept of runs: records, histories, files that appear whole, and who owns them."""
