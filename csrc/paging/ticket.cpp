#include "ticket.h"

#include <utility>

#include "pager.h"

namespace moe_offload {

Ticket::Ticket(std::shared_ptr<Pager> pager, int32_t layer)
    : pager_(std::move(pager)), layer_(layer) {}

Ticket::~Ticket() { close(); }

std::vector<ReadyPage> Ticket::next() { return pager_->next(*this); }

void Ticket::release(std::span<const int32_t> indices) { pager_->release(*this, indices); }

void Ticket::close() { pager_->close(*this); }

}  // namespace moe_offload
