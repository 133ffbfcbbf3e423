"""Planning: what a request needs, what fits, how fast it can be, what `auto` does."""
