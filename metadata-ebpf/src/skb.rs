//! skb
