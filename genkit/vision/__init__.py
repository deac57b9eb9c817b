"""Vision models that look at pictures beside CLIP: a name -> VisionInfo (checked, without torch) -> Loaded."""
