"""An OpenAI-compatible server for many tenants' adapters on one frozen base."""
