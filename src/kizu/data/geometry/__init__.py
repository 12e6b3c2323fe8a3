"""Where things are in a photograph: how the part lies, what is outlined, which zones are inspected."""
