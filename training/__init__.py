"""Fine-tuning the scales of a frozen integer model; knows no GUI and no ComfyUI."""
