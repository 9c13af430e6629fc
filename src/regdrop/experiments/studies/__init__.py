"""What is compared: the arms of each study, and settings chosen for them."""
