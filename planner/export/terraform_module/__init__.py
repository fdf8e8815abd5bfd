"""The provider-less Terraform module that travels with an export; text, no code."""
