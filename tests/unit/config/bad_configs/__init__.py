"""Tables of bad configs, each with the one line that it gets: field = value: rule; remedy."""
