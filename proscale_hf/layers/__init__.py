"""What models are built from: modules that take numbers and know no model's configuration."""
