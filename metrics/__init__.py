"""Measurements and the pictures drawn of them; knows no GUI and no ComfyUI."""
