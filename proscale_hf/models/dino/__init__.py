"""DINO detection with PRO-SCALE: configuration, model, image processors."""
