"""mPLUG's runs: captioning and visual question answering, one file each, on what they have in common."""
