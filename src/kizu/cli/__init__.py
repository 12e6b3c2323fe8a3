"""The command line. Only here are options parsed and errors worded with their flags."""
