"""Finds objects in images, with boxes and masks: Mask R-CNN on a body of ours or of timm, by the one training loop."""
