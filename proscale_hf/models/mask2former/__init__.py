"""Mask2Former with PRO-SCALE: panoptic, instance and semantic segmentation."""
