"""Networks: small ones that ship with weights, and adapters for published models."""
