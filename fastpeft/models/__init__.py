"""Model families: how their modules map onto the engine's blocks; building models and loading published weights."""
