"""What tasks share: settings, data, vocabularies, initial weights, and trainers of text."""
