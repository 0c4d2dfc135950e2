"""The service's domain: jobs, attempts, leases, the outbox. Knows neither HTTP nor torch."""
