//! tidectl
