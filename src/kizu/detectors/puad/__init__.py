"""PUAD (Sugawara and Imamura, 2024)."""
